"""Operators whose gradients are written out by hand; equal to the reference, which they call where none is wanted."""
