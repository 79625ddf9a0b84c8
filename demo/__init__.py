"""The demonstration: a small synthetic world, two trainings, and one page about them."""
