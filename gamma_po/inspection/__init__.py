"""What can be known of a run before it starts: its data, its reference's accuracy, its cost; and what looks wrong."""
