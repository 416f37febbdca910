"""Plain-torch operators: the definition that every other backend is judged against."""
