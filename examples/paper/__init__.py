"""The language models of the Ouroboros paper, and what it takes to train and to measure them."""
