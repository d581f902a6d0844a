"""Files written whole or not at all, exchanged, hashed and read within limits."""
