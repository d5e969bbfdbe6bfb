"""What is true of a graph: its constants, shapes, cost and coupled channels."""
