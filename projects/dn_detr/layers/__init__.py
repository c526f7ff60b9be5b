"""Small modules and functions that two or more methods share."""
