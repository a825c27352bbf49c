"""Multi-query associative recall: sequences, tiny models trained side by side, and accuracy against pairs."""
