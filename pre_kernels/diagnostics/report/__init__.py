"""What `measures` found, as tables, pictures and a page."""
