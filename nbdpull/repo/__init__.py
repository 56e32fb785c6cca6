"""What is kept: a store of immutable objects, and the repository protocol on top of it."""
