"""Language modelling: documents, tokens, sequences, and the loss by position. No model code."""
