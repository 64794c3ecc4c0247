"""From the bytes of an image file to training pixels."""
