"""Files and hub data sets become records. Light to import: readers of heavy formats are loaded when needed."""
