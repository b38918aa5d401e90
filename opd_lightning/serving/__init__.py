"""A teacher behind HTTP: what goes over the wire, and the server's own half."""
