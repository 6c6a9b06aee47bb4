"""Terminal: arguments, progress, tables, output and interrupts."""
