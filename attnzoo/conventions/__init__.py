"""How other libraries spell the same: their layouts, argument orders and states, over this one's."""
