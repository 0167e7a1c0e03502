-- Write a server's record and renew its lifetime, unless another living server has this id.
-- KEYS[1] record   KEYS[2] servers (set)
-- ARGV[1] the record, JSON   ARGV[2] its lifetime in milliseconds   ARGV[3] its instance   ARGV[4] its id
-- Returns {1} when written, {0, URL of the server that has the id} when not.
local found = redis.call('GET', KEYS[1])
if found then
  -- What cannot be read, or names no instance, keeps nobody away.
  local read, record = pcall(cjson.decode, found)
  if read and type(record) == 'table' and type(record.instance) == 'string' and record.instance ~= ''
      and record.instance ~= ARGV[3] then
    return {0, tostring(record.url)}
  end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], ARGV[4])
return {1}
