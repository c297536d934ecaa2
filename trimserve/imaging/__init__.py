"""Image files into pixels, in processes that a bad file may end. Pillow and numpy, nothing else of trimserve."""
