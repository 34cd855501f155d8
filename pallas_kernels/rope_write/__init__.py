"""Rotary embedding of queries and keys, and the writing of keys and values into their pages, in one pass."""
