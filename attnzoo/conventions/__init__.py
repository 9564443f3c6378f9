"""How other libraries spell the same: layouts, argument orders and states, over this one's."""
