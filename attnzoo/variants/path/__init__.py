"""PaTH attention, whose scores pass through the tokens between a query and a key."""
