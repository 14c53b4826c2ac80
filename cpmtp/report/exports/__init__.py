"""What other tools ask for, from one table: how many drafted tokens survive, and how often."""
