# The model on top of the base image; rebuilt only when one of the two changes.
FROM base:1
LABEL "dev.coldstart.model.digest"="sha256:8e28aa5db341772ec32392f9fe1cd05b6841839733747558c9a57c38df3618fe" "dev.coldstart.role"="weights" "dev.coldstart.weights.key"="fdc8b8124e78484b0362c5edcdf66ea620774ca81e083bbee97a4aa12042df82"
COPY ["layers/00/", "/models/Tiny-1B/"]
COPY ["layers/01/", "/models/Tiny-1B/"]
