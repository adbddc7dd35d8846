"""The statistics policies of the family's members."""
