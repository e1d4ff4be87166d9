"""What every room uses: spaces, numbers, checks, files, threads; nothing here knows of models or policies."""
