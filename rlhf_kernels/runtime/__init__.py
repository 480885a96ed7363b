"""What every op needs at run time: the choice of a backend, operator registration, launches, the library."""
