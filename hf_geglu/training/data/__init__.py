"""From rows, wherever they are, to blocks of tokens and examples, and which of them make up a batch."""
