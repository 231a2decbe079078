"""Is the init of a network sound? Follow its data once, measure, judge."""
