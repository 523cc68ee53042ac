"""The harness behind `coldstart bench`: start images, collect phases, keep raw samples, report."""
