"""The maths of one step: statistics, directions, line search, guard and the update. Imports torch only."""
