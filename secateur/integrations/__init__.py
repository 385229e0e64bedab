"""Other libraries: their models built anew, their trainers' events, and folders in the layout of a model hub.

Nothing here is imported by the rest of the package, and each library by its own module alone.
"""
