"""What the delay costs, and what takes it back: many short runs by virtual stages, and the page about them."""
