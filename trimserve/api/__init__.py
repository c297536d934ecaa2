"""What goes in and what comes out, as plain frozen data that every part may import. Needs the standard library only."""
