"""Which module and which op is guilty, in which words, and the proof."""
