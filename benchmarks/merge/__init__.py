"""What a merge costs, against a copy of its inputs and against other libraries."""
