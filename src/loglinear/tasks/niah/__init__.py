"""Needle in a haystack: a sentence hidden in a long text and asked for at its end. No model code."""
