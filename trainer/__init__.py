"""The trainer: trees into advantages, advantages into weights, weights back to the fleet."""
