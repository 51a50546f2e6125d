"""How good a bundle is: texts and questions scored, models compared, tables changed; every figure with its interval."""
