"""Models of this library in other trainers. Each module is named after a package, needs that package, and is imported by it."""
