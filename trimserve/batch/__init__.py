"""Many requests from a file, answered into another: `trimserve batch`."""
