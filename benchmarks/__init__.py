"""What is measured against whom, and how. Nothing here is part of the library."""
