"""Settings for all tests."""

import torch as th

# The networks are so small that threads would only wait for one another; and one thread fixes the order of sums.
th.set_num_threads(1)
