"""Checkpoints from elsewhere: safe reading, and tables that give their parameters our names.

Imports torch alone. `convert` is the door; `tables/` has one file per page.
"""
