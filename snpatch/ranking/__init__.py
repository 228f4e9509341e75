"""Rankings: neurons in an order, what they are made of, and what is drawn beside them."""
