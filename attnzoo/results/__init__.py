"""Result files, the tables that are made of them, and their numbers as text."""
