"""The corpus of short runs."""

TEXT = "The list holds a number.\nIt is an object of a class.\nA class has a name.\n\n" * 40
