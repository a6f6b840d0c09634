"""One function per kind of request: a resolved request goes in, its events come out."""
