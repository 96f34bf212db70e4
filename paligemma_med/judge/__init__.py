"""A language model as the judge of answers to open questions: docs/judge.md.

judge       answers of an evaluation are judged, and the files of that
criteria    what the judge is asked, and how its replies are read
figures     means, agreement with people, cost
client      asks a server many questions, each until there is a usable reply
replies     every reply that a server ever gave, on the disk
server      a server's address and key, and what its faults mean
connection  no redirects, replies of bounded size
outside     what a server says, without keys and passwords, before it is shown or kept
"""
