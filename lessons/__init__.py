"""The lessons. Not part of the installed package: clone the repository to work through them."""
