"""The results of a run for people: the terminal table (`tables`), sentences (`findings`), and the page (`page`,
`figures`).
"""
