"""The front floor: answers people and keeps the books. Knows no torch."""
