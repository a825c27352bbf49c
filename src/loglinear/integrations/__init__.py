"""Other people's trainers that run our models; each module needs the package it is named after, and is imported by it."""
