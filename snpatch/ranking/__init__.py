"""Rankings: neurons in order of their scores, the statistics behind these, and random controls."""
