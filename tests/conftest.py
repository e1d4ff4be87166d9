"""Settings for all tests."""

import torch as th

# Many small networks: threads would only wait for one another, and one thread makes sums come out in one order.
th.set_num_threads(1)
